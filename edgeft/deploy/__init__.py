"""Deployment over SSH: a bundle onto one device or many, only what changed, and back when it does not answer.

agent.py       what runs on the device; sent as text, standard library only
link.py        the SSH connection, host keys, and requests to the agent
parcel.py      a checked bundle and the digests of its chunks
host.py        one device: transfer, installation, question, rollback, status
fleet.py       many: inventory, canary, failure budget
ansible.py     the same for ansible-core
"""
