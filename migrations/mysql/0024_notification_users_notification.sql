-- retention: the links of a notification
-- MySQL knows no CREATE INDEX IF NOT EXISTS: a step may be repeated, so what is there is looked up first.
SET @step = IF(
    (SELECT COUNT(*) FROM information_schema.statistics
     WHERE table_schema = DATABASE() AND table_name = 'notification_users' AND index_name = 'notification_users_notification') = 0,
    'CREATE INDEX notification_users_notification ON notification_users (notification_id)',
    'DO 0'
);
PREPARE step FROM @step;
EXECUTE step;
DEALLOCATE PREPARE step;
