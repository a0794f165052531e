-- everyone's devices of one app, lists by app: in the order of their numbers, which an index has behind its columns
CREATE INDEX IF NOT EXISTS devices_topic ON devices (topic);
