-- Notifications that were deleted and whose chunks, links and notes are still being deleted.
CREATE TABLE IF NOT EXISTS notification_remains (
    notification_id BINARY(16) NOT NULL PRIMARY KEY
) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;
