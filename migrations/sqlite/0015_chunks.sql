-- The work: parts of audiences, with the outcome of each device in a compact form.
-- holder: NULL ended; 0 nobody's; > 0 the replica that sends it; -1 held by the operator; -(1000 + id) parked by a breaker.
-- epoch grows with every change of owner and fences every settle.
CREATE TABLE IF NOT EXISTS chunks (
    notification_id BLOB NOT NULL,
    number INTEGER NOT NULL,
    lane INTEGER NOT NULL,
    holder INTEGER NULL,
    epoch INTEGER NOT NULL,
    due_at INTEGER NOT NULL,
    targets BLOB NULL,              -- NULL: the audience is still to be resolved
    states BLOB NULL,               -- NULL: nothing has been tried
    targeted INTEGER NOT NULL,
    accepted INTEGER NOT NULL,
    failed INTEGER NOT NULL,
    unregistered INTEGER NOT NULL,
    expired INTEGER NOT NULL,
    cancelled INTEGER NOT NULL,
    suppressed INTEGER NOT NULL,
    unanswered INTEGER NOT NULL,    -- the count word is `unknown`, a reserved word to some
    waiting_since INTEGER NULL,     -- held or parked
    ended_at INTEGER NULL,
    PRIMARY KEY (notification_id, number),
    CHECK ((holder IS NULL) = (ended_at IS NOT NULL))
) STRICT;
