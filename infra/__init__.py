"""What runs where: the private k3s site, the cloud sites and the VPN between them, declared with Pulumi.

Pulumi runs this directory (`main: infra` in Pulumi.yaml). The pure part (plan, config, cluster, iam, vpn.plan,
vpn.render, rules) imports no pulumi and is used as it is by tests and by the desk. Of the workloads it knows only
their contract.
"""
