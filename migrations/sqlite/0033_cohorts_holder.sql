-- take-overs, what is open
CREATE INDEX IF NOT EXISTS cohorts_holder ON cohorts (holder) WHERE holder IS NOT NULL;
