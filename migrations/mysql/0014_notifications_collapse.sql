-- notifications_collapse: made with its table.
DO 0;
