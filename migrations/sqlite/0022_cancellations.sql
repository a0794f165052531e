-- Cancelled, and not all of it has ended: what every replica looks at each second.
CREATE TABLE IF NOT EXISTS cancellations (
    notification_id BLOB NOT NULL PRIMARY KEY
) STRICT;
