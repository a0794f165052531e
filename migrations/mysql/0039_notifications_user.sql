-- Who was addressed, where that is one user: a row of notification_users, with two indexes, is for several.
-- Members of a cohort are found by their ids (0038), and no longer by an index.
-- Two steps, because in one MariaDB writes the whole table anew. MySQL knows no ADD COLUMN IF NOT EXISTS: each may be repeated,
-- so what is there is looked up first.
SET @step = IF(
    (SELECT COUNT(*) FROM information_schema.columns
     WHERE table_schema = DATABASE() AND table_name = 'notifications' AND column_name = 'user_id') = 0,
    'ALTER TABLE notifications ADD COLUMN user_id VARBINARY(255) NULL',
    'DO 0'
);
PREPARE step FROM @step;
EXECUTE step;
DEALLOCATE PREPARE step;
SET @step = IF(
    (SELECT COUNT(*) FROM information_schema.statistics
     WHERE table_schema = DATABASE() AND table_name = 'notifications' AND index_name = 'notifications_user') = 0,
    'ALTER TABLE notifications ADD KEY notifications_user (user_id, id), DROP KEY notifications_cohort',
    'DO 0'
);
PREPARE step FROM @step;
EXECUTE step;
DEALLOCATE PREPARE step;
