-- Notifications that were deleted and whose chunks, links and notes are still being deleted.
CREATE TABLE IF NOT EXISTS notification_remains (
    notification_id BLOB NOT NULL PRIMARY KEY
) STRICT, WITHOUT ROWID;
