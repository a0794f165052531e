-- Versions that know no cohorts (0032) would take what is in one for ended: they may not use this database any more.
REPLACE INTO service_facts (name, value) VALUES ('min_reader', '36');
