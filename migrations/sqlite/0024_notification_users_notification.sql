-- retention: the links of a notification
CREATE INDEX IF NOT EXISTS notification_users_notification ON notification_users (notification_id);
