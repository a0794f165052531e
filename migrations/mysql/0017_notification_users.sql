-- Who was addressed: inbox, lists by user, export and erasure.
CREATE TABLE IF NOT EXISTS notification_users (
    user_id VARBINARY(255) NOT NULL,
    notification_id BINARY(16) NOT NULL,
    PRIMARY KEY (user_id, notification_id)
) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;
