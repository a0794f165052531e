-- tag audiences, lists
CREATE INDEX IF NOT EXISTS device_tags_tag ON device_tags (tag, device_seq);
