package engine;

import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.function.BiConsumer;
import org.rocksdb.Checkpoint;
import org.rocksdb.CompressionType;
import org.rocksdb.InfoLogLevel;
import org.rocksdb.Options;
import org.rocksdb.RocksDB;
import org.rocksdb.RocksDBException;
import org.rocksdb.WriteBatch;
import org.rocksdb.WriteOptions;

/**
 * The instances in RocksDB, as Zeebe's brokers configure it: no write-ahead log (the journal is one), every file kept
 * open, checkpoints by hard links.
 */
final class State implements AutoCloseable {
  /** What an instance can be. */
  static final byte ACTIVE = 'A';

  static final byte COMPLETED = 'C';

  private final Options options =
      new Options()
          .setCreateIfMissing(true)
          .setMaxOpenFiles(-1)
          .setWriteBufferSize(4 << 20)
          .setCompressionType(CompressionType.NO_COMPRESSION)
          .setParanoidChecks(true)
          .setInfoLogLevel(InfoLogLevel.WARN_LEVEL);
  private final WriteOptions unlogged = new WriteOptions().setDisableWAL(true);
  private final RocksDB db;

  State(Path directory) throws IOException, RocksDBException {
    Files.createDirectories(directory);
    db = RocksDB.open(options, directory.toString());
  }

  /** Carries out a command of the journal. Its effect depends on nothing but the command and the state. */
  void apply(Journal.Entry entry) throws RocksDBException, IOException {
    var text = new String(entry.content(), StandardCharsets.UTF_8);
    int space = text.indexOf(' ');
    var rest = text.substring(space + 1);
    switch (text.substring(0, space)) {
      case "CREATE" -> put(entry.position(), ACTIVE, rest.getBytes(StandardCharsets.UTF_8));
      case "COMPLETE" -> {
        var id = Long.parseLong(rest);
        var instance = db.get(key(id));
        if (instance == null || instance[0] != ACTIVE) {
          throw new IOException("the journal completes instance " + id + ", which is not active");
        }
        put(id, COMPLETED, java.util.Arrays.copyOfRange(instance, 1, instance.length));
      }
      default -> throw new IOException("the journal holds " + text);
    }
  }

  private void put(long id, byte state, byte[] payload) throws RocksDBException {
    try (var batch = new WriteBatch()) {
      batch.put(key(id), ByteBuffer.allocate(1 + payload.length).put(state).put(payload).array());
      db.write(unlogged, batch);
    }
  }

  /** Reports whether an instance is there and active. */
  boolean active(long id) throws RocksDBException {
    var instance = db.get(key(id));
    return instance != null && instance[0] == ACTIVE;
  }

  private static byte[] key(long id) {
    return ByteBuffer.allocate(8).putLong(id).array();
  }

  /** Walks over all instances: id, and state and payload in one. */
  void each(BiConsumer<Long, byte[]> consumer) throws RocksDBException {
    try (var all = db.newIterator()) {
      for (all.seekToFirst(); all.isValid(); all.next()) {
        consumer.accept(ByteBuffer.wrap(all.key()).getLong(), all.value());
      }
      all.status();
    }
  }

  /** Writes the state to a directory that is not there yet, by hard links to its files. */
  void checkpoint(Path directory) throws RocksDBException {
    try (var checkpoint = Checkpoint.create(db)) {
      checkpoint.createCheckpoint(directory.toString());
    }
  }

  @Override
  public void close() {
    db.close();
    unlogged.close();
    options.close();
  }
}
