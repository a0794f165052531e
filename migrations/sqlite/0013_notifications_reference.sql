-- did order 1042 arrive?
CREATE INDEX IF NOT EXISTS notifications_reference ON notifications (reference, id) WHERE reference IS NOT NULL;
