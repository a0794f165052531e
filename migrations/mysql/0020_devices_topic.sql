-- devices_topic: made with its table.
DO 0;
