"""Files that outlive their writer, and what others may have put in their place.

`records` has JSON with a checksum, by file and by line; `replacing` what is written whole or not at all; `opening` regular files
and nothing else; `sharing` whose a file is; `locks` file locks.
"""
