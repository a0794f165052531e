//! The stream limit of one connection: how it rises and falls, and what becomes of the streams above it.

use super::{Connection, Whole, count};
use crate::sim::fault::Answer;

/// `MAX_CONCURRENT_STREAMS` of one connection.
#[derive(Debug)]
pub(super) struct StreamLimit {
    /// What it is before the first accepted provider token.
    initial: u32,
    /// What the client was told.
    pub(super) told: u32,
    /// What it is to be told as soon as it has acknowledged the last SETTINGS.
    pub(super) wanted: Option<u32>,
    /// Whether a provider token was accepted, so that the limit is the full one.
    pub(super) is_raised: bool,
    /// Whether the limit was ever lowered: the client may not have heard, so the surplus is refused, not punished.
    pub(super) has_fallen: bool,
    /// Whether a refusal has lowered it to 1.
    pub(super) is_shrunk: bool,
}

impl StreamLimit {
    /// At first the client is told `told`.
    pub(super) const fn new(initial: u32, told: u32) -> Self {
        Self { initial, told, wanted: None, is_raised: false, has_fallen: false, is_shrunk: false }
    }

    /// Whether so many streams may be open.
    pub(super) const fn allows(&self, open: usize) -> bool {
        open <= self.told as usize
    }

    /// The client shall be told another limit: no more than at first until a provider token is accepted, no more than 1
    /// between a refusal and the next 200.
    pub(super) fn want(&mut self, limit: u32) {
        let limit = if self.is_raised { limit } else { limit.min(self.initial) };
        let limit = if self.is_shrunk { limit.min(1) } else { limit };
        self.has_fallen |= limit < self.told;
        self.wanted = Some(limit);
    }

    /// What an answer does to a limit that adapts: 1 after a refusal, `full` after the next 200.
    pub(super) fn adapt(&mut self, answer: &Answer, full: u32, adapts: bool) {
        let is_shrunk = match answer {
            Answer::Accepted => false,
            refusal if refusal.is_error() => adapts,
            _ => return,
        };
        if is_shrunk != self.is_shrunk {
            self.is_shrunk = is_shrunk;
            self.want(full);
        }
    }
}

impl Connection<'_> {
    /// Resets the newest streams above the limit that are not processed yet. Those that a script left unanswered stay.
    pub(super) fn refuse_surplus(&mut self) {
        let surplus = self.open.saturating_sub(self.limit.told as usize);
        if surplus == 0 {
            return;
        }
        let waiting = self.held.iter().chain(self.due.values()).map(|waiting| waiting.request.stream);
        let arriving = self.arriving.iter().map(|request| request.stream).filter(|stream| *stream > 0);
        let mut unprocessed: Vec<_> = waiting.chain(arriving).collect();
        unprocessed.sort_unstable();
        let kept = unprocessed.len().saturating_sub(surplus);
        let Some(&first) = unprocessed.get(kept) else { return };
        for waiting in std::mem::take(&mut self.held) {
            if waiting.request.stream < first {
                self.held.push(waiting);
            } else {
                self.refuse(waiting.request);
            }
        }
        for (place, waiting) in std::mem::take(&mut self.due) {
            if waiting.request.stream < first {
                self.due.insert(place, waiting);
            } else {
                self.refuse(waiting.request);
            }
        }
        let arriving = self.arriving.len();
        self.arriving.retain_mut(|request| {
            let stays = request.stream < first; // not looked at yet: 0, stays
            if !stays {
                request.respond.send_reset(h2::Reason::REFUSED_STREAM);
            }
            stays
        });
        let refused = arriving - self.arriving.len();
        self.open = self.open.saturating_sub(refused);
        (0..refused).for_each(|_| count(&self.tally().reset));
    }

    /// Gives back a push that was received whole and not processed.
    fn refuse(&mut self, mut request: Whole<'_>) {
        self.open -= 1;
        count(&self.tally().reset);
        request.respond.send_reset(h2::Reason::REFUSED_STREAM);
        self.prover.receipts.expect(request.stream, request.attempt.unprocessed());
    }
}
