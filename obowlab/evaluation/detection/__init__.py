"""PASCAL VOC's detection metric, and the score of a detector with its interval."""
