"""`script/chaos`: a storm of requests and faults over a whole installation, and a verdict on what came of it.

=============  =======================================================================================
schedule.py    which fault hits what, when and for how long: a function of the seed
workload.py    whose lives the clients live: what is asked of each VM, when, over which door; likewise
history.py     what every client asked for and was told
doors.py       one attempt at one request, over REST or AMQP
lives.py       clients that live those lives
watcher.py     those who only listen
crowd.py       everybody's projects, clients and watchers
house.py       the installation: its processes, hosts, projects; what systemd would do for it
nemesis.py     does what the schedule says
snapshot.py    all that there is in the end: rows, log, queues, domains, files
looking.py     how that is found out
case.py        a history and a snapshot, indexed; the sorts of things that may not be
rules.py       what may not be: pure functions over a case
baseline.py    what every process holds: memory, file descriptors, threads, connections
storm.py       all of it, one after the other
report.py      the verdict, as Markdown
=============  =======================================================================================
"""
