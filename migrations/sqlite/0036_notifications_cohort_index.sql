-- the members of a cohort
CREATE INDEX IF NOT EXISTS notifications_cohort ON notifications (cohort) WHERE cohort IS NOT NULL;
