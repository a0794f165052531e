-- device_tags_tag: made with its table.
DO 0;
