-- retention: the oldest tombstones first
CREATE INDEX IF NOT EXISTS device_tombstones_forgotten ON device_tombstones (forgotten_at);
