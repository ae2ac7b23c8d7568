"""Two sites and the VPN between them on one machine: network namespaces, real tunnels, real BGP, a wire to harm.

`rig.Rig` is what others use. Linux and root only. What is encrypted is encrypted by charon itself (kernel-libipsec):
the kernel's ESP is not needed and not tested here.
"""
