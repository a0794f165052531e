-- replaced tokens, log-out
CREATE INDEX IF NOT EXISTS devices_installation ON devices (installation_id, topic) WHERE installation_id IS NOT NULL;
