-- Who was addressed: inbox, lists by user, export and erasure.
CREATE TABLE IF NOT EXISTS notification_users (
    user_id BLOB NOT NULL,
    notification_id BLOB NOT NULL,
    PRIMARY KEY (user_id, notification_id)
) STRICT, WITHOUT ROWID;
