-- notifications_cohort: made with notifications.cohort.
DO 0;
