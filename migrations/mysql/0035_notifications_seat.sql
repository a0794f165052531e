-- notifications.seat: made with notifications.cohort.
DO 0;
