package search;

import java.io.EOFException;
import java.io.IOException;
import java.io.InputStream;
import java.net.URI;
import java.nio.file.FileAlreadyExistsException;
import java.nio.file.NoSuchFileException;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import org.opensearch.common.blobstore.BlobContainer;
import org.opensearch.common.blobstore.BlobMetadata;
import org.opensearch.common.blobstore.BlobPath;
import org.opensearch.common.blobstore.BlobStore;
import org.opensearch.common.blobstore.DeleteResult;
import org.opensearch.common.blobstore.support.AbstractBlobContainer;
import org.opensearch.common.blobstore.support.PlainBlobMetadata;
import software.amazon.awssdk.core.exception.SdkException;
import software.amazon.awssdk.core.sync.RequestBody;
import software.amazon.awssdk.regions.Region;
import software.amazon.awssdk.services.s3.S3Client;
import software.amazon.awssdk.services.s3.model.CompletedPart;
import software.amazon.awssdk.services.s3.model.NoSuchKeyException;
import software.amazon.awssdk.services.s3.model.ObjectIdentifier;
import software.amazon.awssdk.services.s3.model.S3Exception;

/** Blobs as objects of a bucket, with the operations of OpenSearch's repository-s3. Retries are the SDK's own. */
final class S3BlobStore implements BlobStore {
  /** Blobs above it go in parts of this size, as OpenSearch's default on large heaps. */
  private static final int PART = 16 << 20;

  private static final int DELETE_AT_ONCE = 1000;

  private final S3Client s3;
  private final String bucket;

  S3BlobStore(String endpoint, String bucket) {
    this.bucket = bucket;
    s3 = S3Client.builder().endpointOverride(URI.create(endpoint)).region(Region.EU_CENTRAL_1).forcePathStyle(true).build();
  }

  @Override
  public BlobContainer blobContainer(BlobPath path) {
    return new Container(path);
  }

  @Override
  public void close() {
    s3.close();
  }

  /** Not readNBytes(int): it also reads zero bytes, which Lucene's streams answer with the end of the file. */
  private static byte[] exactly(InputStream content, int size) throws IOException {
    var all = new byte[size];
    if (content.readNBytes(all, 0, size) < size) {
      throw new EOFException("a blob is shorter than " + size + " bytes");
    }
    return all;
  }

  private final class Container extends AbstractBlobContainer {
    private final String prefix;

    Container(BlobPath path) {
      super(path);
      prefix = path.buildAsString();
    }

    @Override
    public boolean blobExists(String name) throws IOException {
      try {
        s3.headObject(b -> b.bucket(bucket).key(prefix + name));
        return true;
      } catch (NoSuchKeyException absent) {
        return false;
      } catch (SdkException e) {
        throw new IOException("head " + prefix + name, e);
      }
    }

    @Override
    public InputStream readBlob(String name) throws IOException {
      return read(name, null);
    }

    @Override
    public InputStream readBlob(String name, long position, long length) throws IOException {
      return length == 0 ? InputStream.nullInputStream() : read(name, "bytes=" + position + "-" + (position + length - 1));
    }

    private InputStream read(String name, String range) throws IOException {
      try {
        return s3.getObject(b -> b.bucket(bucket).key(prefix + name).range(range));
      } catch (NoSuchKeyException absent) {
        throw new NoSuchFileException(prefix + name);
      } catch (SdkException e) {
        throw new IOException("get " + prefix + name, e);
      }
    }

    @Override
    public void writeBlob(String name, InputStream content, long size, boolean failIfAlreadyExists) throws IOException {
      var key = prefix + name;
      try {
        if (size > PART) {
          inParts(key, content, size);
          return;
        }
        var body = exactly(content, (int) size); // kept, so that the SDK can send it again
        s3.putObject(b -> b.bucket(bucket).key(key).ifNoneMatch(failIfAlreadyExists ? "*" : null), RequestBody.fromBytes(body));
      } catch (S3Exception e) {
        if (e.statusCode() == 412) {
          throw new FileAlreadyExistsException(key);
        }
        throw new IOException("put " + key, e);
      } catch (SdkException e) {
        throw new IOException("put " + key, e);
      }
    }

    private void inParts(String key, InputStream content, long size) throws IOException {
      var id = s3.createMultipartUpload(b -> b.bucket(bucket).key(key)).uploadId();
      var parts = new ArrayList<CompletedPart>();
      try {
        for (long at = 0; at < size; at += PART) {
          int number = parts.size() + 1;
          var body = exactly(content, (int) Math.min(PART, size - at));
          var tag = s3.uploadPart(b -> b.bucket(bucket).key(key).uploadId(id).partNumber(number), RequestBody.fromBytes(body)).eTag();
          parts.add(CompletedPart.builder().partNumber(number).eTag(tag).build());
        }
        s3.completeMultipartUpload(b -> b.bucket(bucket).key(key).uploadId(id).multipartUpload(m -> m.parts(parts)));
      } catch (SdkException | IOException e) {
        s3.abortMultipartUpload(b -> b.bucket(bucket).key(key).uploadId(id));
        throw e;
      }
    }

    @Override
    public void writeBlobAtomic(String name, InputStream content, long size, boolean failIfAlreadyExists) throws IOException {
      writeBlob(name, content, size, failIfAlreadyExists);
    }

    @Override
    public DeleteResult delete() throws IOException {
      long bytes = 0;
      var keys = new ArrayList<String>();
      try {
        for (var object : s3.listObjectsV2Paginator(b -> b.bucket(bucket).prefix(prefix)).contents()) {
          keys.add(object.key());
          bytes += object.size();
        }
        remove(keys);
      } catch (SdkException e) {
        throw new IOException("delete " + prefix, e);
      }
      return new DeleteResult(keys.size(), bytes);
    }

    @Override
    public void deleteBlobsIgnoringIfNotExists(List<String> names) throws IOException {
      try {
        remove(names.stream().map(name -> prefix + name).toList());
      } catch (SdkException e) {
        throw new IOException("delete below " + prefix, e);
      }
    }

    private void remove(List<String> keys) throws IOException {
      for (int i = 0; i < keys.size(); i += DELETE_AT_ONCE) {
        var ids = keys.subList(i, Math.min(keys.size(), i + DELETE_AT_ONCE)).stream().map(key -> ObjectIdentifier.builder().key(key).build()).toList();
        var errors = s3.deleteObjects(b -> b.bucket(bucket).delete(d -> d.quiet(true).objects(ids))).errors();
        if (!errors.isEmpty()) {
          throw new IOException("delete: " + errors);
        }
      }
    }

    @Override
    public Map<String, BlobMetadata> listBlobs() throws IOException {
      return listBlobsByPrefix("");
    }

    @Override
    public Map<String, BlobMetadata> listBlobsByPrefix(String start) throws IOException {
      var all = new HashMap<String, BlobMetadata>();
      try {
        for (var object : s3.listObjectsV2Paginator(b -> b.bucket(bucket).prefix(prefix + start).delimiter("/")).contents()) {
          var name = object.key().substring(prefix.length());
          all.put(name, new PlainBlobMetadata(name, object.size()));
        }
      } catch (SdkException e) {
        throw new IOException("list " + prefix + start, e);
      }
      return all;
    }

    @Override
    public Map<String, BlobContainer> children() throws IOException {
      var all = new HashMap<String, BlobContainer>();
      try {
        for (var common : s3.listObjectsV2Paginator(b -> b.bucket(bucket).prefix(prefix).delimiter("/")).commonPrefixes()) {
          var name = common.prefix().substring(prefix.length(), common.prefix().length() - 1);
          all.put(name, new Container(path().add(name)));
        }
      } catch (SdkException e) {
        throw new IOException("list " + prefix, e);
      }
      return all;
    }
  }
}
