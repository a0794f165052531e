-- Members of a cohort are found by their ids (0038), and no longer by an index.
DROP INDEX IF EXISTS notifications_cohort;
-- Who was addressed, where that is one user: a row of notification_users, with two indexes, is for several.
-- Differs: three steps, which MySQL makes in one; here all steps are one transaction.
ALTER TABLE notifications ADD COLUMN user_id BLOB NULL;
CREATE INDEX IF NOT EXISTS notifications_user ON notifications (user_id, id) WHERE user_id IS NOT NULL;
