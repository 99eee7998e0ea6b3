"""Kills, a full disk, read-only folders, several writers, a moved clock, stops:  python -m bench.faults --only kills

Commands run on the digits as a user would start them; all but the stops and Ray in forked processes that have imported
torch already, so that random moments fall into the run. A run that ended is a unit: its folder, with a checksum of all
that may not vary between whole runs (not: times, host, logs, pictures). After each fault every unit has to be as it was
before or as an undisturbed run makes it, none is missing, nothing is half-written under a final name. The command is
run again then and must come to the undisturbed run's units, with no temporary file left. Root is needed, to mount small
disks and to become a user without rights. bench/results/faults.json has a row for each: what was tried, how often, and
what was lost; `--only` replaces the rows of one fault. A row to which someone adds `mended`, the cause and what was
done about it, stays, and the page tells it as history.
"""
