"""A socket that gets every frame that comes in at a device of the namespace it is made in. Root; Linux's packet(7)."""

from __future__ import annotations

import socket
import struct
from typing import Final

ETHERNET: Final = 14
"""Bytes of a frame before its packet."""
FRAME_MAX: Final = 65_536

_ETH_P_ALL: Final = 0x0003
_SOL_PACKET: Final = 263
_PACKET_STATISTICS: Final = 6
_PACKET_IGNORE_OUTGOING: Final = 23
_SO_RCVBUFFORCE: Final = 33


def tap(device: str, *, buffer_bytes: int) -> socket.socket:
    """It does not block, and what is sent over it leaves the device. What leaves otherwise is not seen."""
    opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
    opened.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, buffer_bytes)
    opened.bind((device, _ETH_P_ALL))
    opened.settimeout(0)
    return opened


def missed(opened: socket.socket) -> int:
    """Frames since the last call that found the buffer full."""
    _, dropped = struct.unpack("II", opened.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
    return int(dropped)
