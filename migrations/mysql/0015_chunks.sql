-- The work: parts of audiences, with the outcome of each device in a compact form.
-- holder: NULL ended; 0 nobody's; > 0 the replica that sends it; -1 held by the operator; -(1000 + id) parked by a breaker.
-- epoch grows with every change of owner and fences every settle.
CREATE TABLE IF NOT EXISTS chunks (
    notification_id BINARY(16) NOT NULL,
    number INT NOT NULL,
    lane TINYINT NOT NULL,
    holder BIGINT NULL,
    epoch BIGINT NOT NULL,
    due_at BIGINT NOT NULL,
    targets MEDIUMBLOB NULL,        -- NULL: the audience is still to be resolved
    states MEDIUMBLOB NULL,         -- NULL: nothing has been tried
    targeted INT NOT NULL,
    accepted INT NOT NULL,
    failed INT NOT NULL,
    unregistered INT NOT NULL,
    expired INT NOT NULL,
    cancelled INT NOT NULL,
    suppressed INT NOT NULL,
    unanswered INT NOT NULL,        -- the count word is `unknown`, a reserved word to some
    waiting_since BIGINT NULL,      -- held or parked
    ended_at BIGINT NULL,
    PRIMARY KEY (notification_id, number),
    KEY chunks_work (holder, lane, due_at), -- claims, take-overs, what is parked, the oldest due
    CONSTRAINT chunks_ended CHECK ((holder IS NULL) = (ended_at IS NOT NULL))
) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;
