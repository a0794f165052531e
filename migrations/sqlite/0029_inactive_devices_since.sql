-- retention: those that are inactive longest first
CREATE INDEX IF NOT EXISTS inactive_devices_since ON inactive_devices (since, device_seq);
