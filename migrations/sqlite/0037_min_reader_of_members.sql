-- Versions that look for the members of a cohort by an index (0036), and for those who were addressed in one table, would
-- miss some from 0038 and 0039 on: they may not use this database any more.
REPLACE INTO service_facts (name, value) VALUES ('min_reader', X'3339');
