-- claims, take-overs, what is parked, the oldest due
CREATE INDEX IF NOT EXISTS chunks_work ON chunks (holder, lane, due_at) WHERE holder IS NOT NULL;
