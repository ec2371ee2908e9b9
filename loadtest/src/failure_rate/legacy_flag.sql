-- Every order by the synchronous path, from the first call on.
INSERT INTO logistics.flag_values (version, mode, rest, share, set_by, reason)
VALUES (1, 'legacy', 'legacy', 10000, 'loadtest', 'the synchronous path is measured');
