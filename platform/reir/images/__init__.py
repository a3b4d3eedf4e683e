"""One image and what is found on it: decoding, boxes, masks, drawing."""
