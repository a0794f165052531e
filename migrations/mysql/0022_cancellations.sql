-- Cancelled, and not all of it has ended: what every replica looks at each second.
CREATE TABLE IF NOT EXISTS cancellations (
    notification_id BINARY(16) NOT NULL PRIMARY KEY
) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;
