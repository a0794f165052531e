-- Versions that know no acceptances (0041) would take a token that APNs has accepted for one that it never did, and a refusal
-- for its death: they may not use this database any more.
REPLACE INTO service_facts (name, value) VALUES ('min_reader', X'3431');
