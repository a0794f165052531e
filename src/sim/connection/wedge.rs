//! Connections that have gone bad: wedged ones, and those idle for too long.

use std::time::Duration;

use super::{Answer, Connection, FaultAction, Reason};
use crate::sim::{
    conduct::{AfterTokenError, ExpiredToken, IdleEnd},
    gate::Wedge,
};

impl Connection<'_> {
    /// What a wedged connection does instead of `action`.
    pub(super) fn or_wedged(&self, action: FaultAction) -> FaultAction {
        match &self.wedge {
            None => action,
            Some(Wedge::Silence) => FaultAction::Stall { accepted: false },
            Some(Wedge::Repeat(answer)) => FaultAction::Answer(answer.clone()),
        }
    }

    /// How a failed check is told.
    pub(super) fn conducted(&self, answer: Answer) -> FaultAction {
        match (&answer, self.conduct.expired_token) {
            (Answer::Refused(Reason::ExpiredProviderToken, _), ExpiredToken::InternalServerError) => {
                FaultAction::Answer(Answer::refusal(Reason::InternalServerError))
            }
            (Answer::Refused(Reason::ExpiredProviderToken, _), ExpiredToken::Silence) => {
                FaultAction::Stall { accepted: false }
            }
            _ => FaultAction::Answer(answer),
        }
    }

    /// Wedges the connection behind an error of its provider token, where that is wanted.
    pub(super) fn wedge_after(&mut self, answer: &Answer) {
        if let Answer::Refused(Reason::ExpiredProviderToken | Reason::TooManyProviderTokenUpdates, _) = answer {
            self.wedge = match self.conduct.after_token_error {
                AfterTokenError::GoesOn => return,
                AfterTokenError::Repeats => Some(Wedge::Repeat(answer.clone())),
                AfterTokenError::FallsSilent => Some(Wedge::Silence),
            };
        }
    }

    /// Counts what the client has brought on itself, and sends it away for too much of it.
    pub(super) fn count_error(&mut self, answer: &Answer) {
        let Some(max) = self.conduct.max_errors.filter(|_| answer.is_error()) else { return };
        let weight = if matches!(answer, Answer::Refused(Reason::BadDeviceToken, _)) { 2 } else { 1 };
        let were_few = self.errors < max.get();
        self.errors = self.errors.saturating_add(weight);
        if were_few && self.errors >= max.get() {
            self.go_away(None, 0, String::new(), false);
        }
    }

    /// Something was answered, or the timeout is new.
    pub(super) fn touch(&mut self) {
        if self.conduct.idle_timeout.is_some() {
            self.last_active = self.state.clock.monotonic();
        }
    }

    /// A request comes: perhaps too late.
    pub(super) fn note_request(&mut self) {
        if let Some(timeout) = self.conduct.idle_timeout {
            let now = self.state.clock.monotonic();
            self.is_expired |= self.open == 0 && now.saturating_sub(self.last_active) >= timeout.after();
            self.last_active = now;
        }
    }

    /// When it is to be sent away for that.
    pub(super) fn idle_end(&self) -> Option<Duration> {
        let timeout = self.conduct.idle_timeout?;
        let applies = timeout.by == IdleEnd::GoAway && self.open == 0 && !self.is_expired;
        applies.then(|| self.last_active.saturating_add(timeout.after()))
    }
}
