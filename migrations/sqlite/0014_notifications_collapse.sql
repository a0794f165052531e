-- is there a newer one?
CREATE INDEX IF NOT EXISTS notifications_collapse ON notifications (collapse_id, id) WHERE collapse_id IS NOT NULL;
