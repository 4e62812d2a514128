async def test_what_arrives_is_the_log_through_restarts_and_kills(tmp_path: Path) -> None:
    async with _node(tmp_path) as node:
        with running_rsyslog(tmp_path / "receiver", node.pki) as receiver:
            async with _shipping(node.shipper(receiver.port)) as shipper:
                recording = asyncio.create_task(_record(node, EVENTS - 1))
                await _until(lambda: shipper.view().sent > 3000)
                await asyncio.to_thread(receiver.stop)
                pid = node.launcher.pid
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
                await _until(lambda: not shipper.view().connected)
                await asyncio.to_thread(receiver.start)
                await recording
                size = (await node.recorder.checkpoint())["size"]
                assert size >= EVENTS
                wanted = {ocsf.stable_id(KEY.name, sequence) for sequence in range(size)}
                await _until(lambda: shipper.view().sent == size)
                await _until(lambda: any(f'"size":{size},' in line for line in receiver.received[-50:]))
        assert {each for each in _ids(receiver) if "/checkpoint/" not in each} == wanted
        lines = (tmp_path / "receiver" / "received").read_text().splitlines()
        found = verify_export(lines, KEY.verifier(), checkpoint=LogReader(node.log).note)
        assert (found.first, found.end, found.proved_to) == (0, size, size)
