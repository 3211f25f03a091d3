"""gRPC: the methods of a replica, their messages, statuses and keys.

What Ray Serve's proxies import is :mod:`cluster.grpc_ingress`: configurations name it.
"""
