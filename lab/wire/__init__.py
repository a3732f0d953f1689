"""One frame format for everything that crosses machines, with its limits, its handshake and both kinds of sockets.

`Endpoint` says what a side brings; `FrameSocket` (threads) and `FrameServer`, `FrameConnection`, `connect` (asyncio)
speak it. Tensors are in `lab.wire.tensors`, which loads torch.
"""
