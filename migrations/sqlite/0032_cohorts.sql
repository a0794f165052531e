-- Notifications for one device each that were accepted together: the chunks of all of them, in one row.
-- seats: of each 4 bytes: 0 it is open; FFFFFFFF it has a row of its own in chunks; else it was accepted by APNs, the number
-- less one of milliseconds after accepted_at.
CREATE TABLE IF NOT EXISTS cohorts (
    id BLOB NOT NULL PRIMARY KEY,        -- of the notification that is first by its id
    topic TEXT NOT NULL,
    lane INTEGER NOT NULL,
    holder INTEGER NULL,                 -- the replica that sends what is open; NULL: nothing is
    due_at INTEGER NOT NULL,             -- of the oldest
    accepted_at INTEGER NOT NULL,
    targets BLOB NOT NULL,               -- one a seat
    seats BLOB NOT NULL,
    open INTEGER NOT NULL,
    accepted INTEGER NOT NULL
) STRICT;
