"""The other process of `lab.wire.ping_pong`."""

import asyncio

from lab.wire.ping_pong import serve

if __name__ == "__main__":
    asyncio.run(serve())
