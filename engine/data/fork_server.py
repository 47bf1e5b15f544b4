"""Loaded by the server that data workers are forked from, and by nothing else: it leaves signals to the training.

Launchers and schedulers signal whole process groups. A server that ended there would take its workers with it, before
the training process has saved. It ends with the training process, whose end it notices by itself.
"""

import signal

for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
