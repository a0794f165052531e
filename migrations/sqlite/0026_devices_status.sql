-- retention: devices that are not active, in the order of their numbers, which an index has behind its columns
CREATE INDEX IF NOT EXISTS devices_status ON devices (status);
