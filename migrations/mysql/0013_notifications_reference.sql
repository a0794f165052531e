-- notifications_reference: made with its table.
DO 0;
