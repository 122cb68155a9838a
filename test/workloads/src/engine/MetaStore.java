package engine;

import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.channels.FileChannel;
import java.nio.file.Path;
import java.nio.file.StandardOpenOption;

/** The position up to which the journal is flushed, overwritten in place through a descriptor with O_DSYNC. */
final class MetaStore implements AutoCloseable {
  private static final int SIZE = 16;

  private final FileChannel channel;

  MetaStore(Path file) throws IOException {
    channel = FileChannel.open(file, StandardOpenOption.CREATE, StandardOpenOption.READ, StandardOpenOption.WRITE, StandardOpenOption.DSYNC);
  }

  /** 0 for a new store. */
  long load() throws IOException {
    var buffer = ByteBuffer.allocate(SIZE);
    if (channel.read(buffer, 0) < SIZE) {
      return 0;
    }
    long position = buffer.getLong(0);
    if (buffer.getLong(8) != ~position) {
      throw new IOException("the meta store is torn: " + position);
    }
    return position;
  }

  void store(long position) throws IOException {
    channel.write(ByteBuffer.allocate(SIZE).putLong(0, position).putLong(8, ~position), 0);
  }

  @Override
  public void close() throws IOException {
    channel.close();
  }
}
