//! The flow-control windows of one connection: how large they are, and when what was read is given back.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use h2::FlowControl;

use crate::domain::clock::Clock;

/// The windows of a connection.
pub(super) struct Windows {
    clock: Arc<dyn Clock>,
    /// The initial window of every stream.
    pub(super) stream: u32,
    /// How long what was read waits before it is given back by `WINDOW_UPDATE`.
    pub(super) delay: Duration,
    /// What waits, in order.
    waiting: VecDeque<(Duration, FlowControl, usize)>,
    /// Whether something waits that nobody has set a timer for.
    is_new: bool,
}

impl Windows {
    pub(super) const fn new(clock: Arc<dyn Clock>, stream: u32, delay: Duration) -> Self {
        Self { clock, stream, delay, waiting: VecDeque::new(), is_new: false }
    }

    /// So much of a body was read. `false`: more than there was.
    pub(super) fn was_read(&mut self, flow: &mut FlowControl, bytes: usize) -> bool {
        if self.delay.is_zero() {
            return flow.release_capacity(bytes).is_ok();
        }
        self.waiting.push_back((self.clock.monotonic().saturating_add(self.delay), flow.clone(), bytes));
        self.is_new = true;
        true
    }

    /// When something is to be given back.
    pub(super) fn due(&self) -> Option<Duration> {
        self.waiting.front().map(|(due, ..)| *due)
    }

    /// Whether a timer is missing since this was asked last.
    pub(super) fn take_new(&mut self) -> bool {
        std::mem::take(&mut self.is_new)
    }

    /// Gives back what is due.
    pub(super) fn give_back(&mut self, now: Duration) {
        while self.due().is_some_and(|due| due <= now) {
            let Some((_, mut flow, bytes)) = self.waiting.pop_front() else { return };
            // A stream that has ended needs nothing back.
            let _ = flow.release_capacity(bytes);
        }
    }
}
