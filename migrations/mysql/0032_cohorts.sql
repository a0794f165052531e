-- Notifications for one device each that were accepted together: the chunks of all of them, in one row.
-- seats: of each 4 bytes: 0 it is open; FFFFFFFF it has a row of its own in chunks; else it was accepted by APNs, the number
-- less one of milliseconds after accepted_at.
CREATE TABLE IF NOT EXISTS cohorts (
    id BINARY(16) NOT NULL PRIMARY KEY,  -- of the notification that is first by its id
    topic VARCHAR(155) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    lane TINYINT NOT NULL,
    holder BIGINT NULL,                  -- the replica that sends what is open; NULL: nothing is
    due_at BIGINT NOT NULL,              -- of the oldest
    accepted_at BIGINT NOT NULL,
    targets MEDIUMBLOB NOT NULL,         -- one a seat
    seats MEDIUMBLOB NOT NULL,
    open INT NOT NULL,
    accepted INT NOT NULL,
    KEY cohorts_holder (holder)
) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;
