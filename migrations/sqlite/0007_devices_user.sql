-- user_ids audiences, lists
CREATE INDEX IF NOT EXISTS devices_user ON devices (user_id, topic) WHERE user_id IS NOT NULL;
